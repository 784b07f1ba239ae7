"""OTHER PEOPLE'S CHECKPOINTS <-> our parameter trees."""
