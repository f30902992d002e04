"""The operating system and the compiler: durable files, signals, exit statuses, cached machine code."""
