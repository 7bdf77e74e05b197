"""The paper's scaling study: grid, runs, laws, figures and advice."""
