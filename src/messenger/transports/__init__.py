"""What moves bytes: ZeroMQ sockets, the machine's runtime folder and inproc names, and the descriptors to sleep on."""
