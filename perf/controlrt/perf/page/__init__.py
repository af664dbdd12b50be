"""One page of HTML of a result: ``controlrt bench page``."""
