"""What the operations run on: this machine's hardware, reused memory, packed weights, and the native library."""
