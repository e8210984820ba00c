"""What names of hosts mean beyond ssh_config: groups of hosts, and Ansible's inventories."""
