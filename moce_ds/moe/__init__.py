"""Expert layers, routed by cluster (gate, routing plan, placement, expert layer) or by token (DeepSpeed's layer)."""
