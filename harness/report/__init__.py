"""What runs and studies say, for people: findings, tables, pictures and the page."""
