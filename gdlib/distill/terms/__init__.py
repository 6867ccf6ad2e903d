"""Loss terms, one per file: a pure function with the formula, and a small class that says where its
inputs come from.

Pixels without a label count in terms that read none: the teacher has an opinion there too. Terms
with class weights or instances leave them out.
"""
