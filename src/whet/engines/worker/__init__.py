"""What runs inside a server's own environment: no module here imports anything of whet's."""
