"""What a run will take, from its settings alone: parameters, FLOPs, bytes on the wire, memory, time."""
