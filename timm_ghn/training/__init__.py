"""Training of graph hypernetworks: images, sampled architectures, the loop and its command."""
