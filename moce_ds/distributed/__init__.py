"""What every process of a group needs: runtime, rendezvous, watchdog, small exchanges, randomness."""
