"""The cluster-conditional expert layer: gate, plan, exchange, layer."""
