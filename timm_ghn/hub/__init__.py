"""The Hugging Face Hub: pushing initialized weights and GHNs, and taking them from there."""
