"""The web page: draws or takes a picture, makes a control of it, and shows what the service draws; ``serve --ui``."""
