"""Quality of features and models: k-NN, linear probe, reconstruction error."""
