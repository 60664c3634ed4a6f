"""What things cost: time, memory, energy, bytes on a cable."""
