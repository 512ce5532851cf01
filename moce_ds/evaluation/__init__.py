"""What features are worth: k-NN, linear probe, reconstruction error."""
