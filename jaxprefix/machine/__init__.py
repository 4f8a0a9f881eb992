"""What programs run on: devices, other processes, memory, the user's cache, the terminal."""
