"""How a variant is studied: data, training, evaluation, tracking, comparison."""
