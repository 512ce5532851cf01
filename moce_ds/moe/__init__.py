"""The cluster-conditional expert layer: gate, plan, placement, experts, layer."""
