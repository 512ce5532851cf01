"""The dense masked autoencoder and the one with experts."""
