"""What a run will cost, from its settings alone: parameters, FLOPs, network traffic, memory, time."""
