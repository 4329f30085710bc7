"""What we are compared with. These scripts run in ``.venv-peers`` and never import our packages."""
