"""The masked autoencoders, dense and with experts, and the names of their parameters."""
