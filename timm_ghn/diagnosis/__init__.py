"""What is wrong or unusual: the installation, activations of a network, coverage of timm."""
