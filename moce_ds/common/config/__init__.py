"""How settings are declared, read, checked and printed."""
