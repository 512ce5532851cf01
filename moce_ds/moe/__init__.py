"""Layers of experts: routed by cluster (gate, plan, placement, experts, layer), and by token (token_layer)."""
