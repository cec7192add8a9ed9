"""Images and labels: data sets, their order, loaders."""
