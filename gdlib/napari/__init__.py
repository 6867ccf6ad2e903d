"""Plug-in of napari: a panel that finds objects, a reader of our files, a sample image.

`napari.yaml` says what there is. Nothing here is imported unless napari asks for it, and napari, Qt
and torch are imported where they are used.
"""
