"""Recipes as YAML files; :func:`qvit.train.recipe.load_recipe` reads them."""
