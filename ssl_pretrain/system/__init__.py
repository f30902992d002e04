"""Services around the operating system: durable files, signals, exit statuses, compiled code."""
