"""What tests share: servers, engines, models, oracles and files."""
