"""Predictions from settings alone: parameters, FLOPs, network traffic, memory, time."""
