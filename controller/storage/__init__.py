"""The stores of the features, on SQLAlchemy; the only package that speaks SQL."""
