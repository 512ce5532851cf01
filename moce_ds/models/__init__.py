"""The masked autoencoders, dense and with experts, and their encoders."""
