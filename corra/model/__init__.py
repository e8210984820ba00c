"""Values: what runs, hosts and answers are. No I/O and no clock."""
