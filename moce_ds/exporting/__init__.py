"""The dense ViT of chosen experts: written, compared with the trained model, and converted to formats."""
