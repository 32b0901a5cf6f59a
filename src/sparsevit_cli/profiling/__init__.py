"""Measurement: latency, multiply-adds, memory, time per stage, and the latency table of a device."""
