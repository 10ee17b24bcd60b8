"""``skipvision serve``: a page on which people ask one model about their images. Needs the extra ``serve``."""
