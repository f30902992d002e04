"""A page of the report as parsed HTML."""

from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "br"}


class ParsedPage(HTMLParser):
    """Tags, headings, embedded images and external URLs of a page, whose tags must balance."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.headings, self.external_urls = [], [], []
        self.num_images, self.tags, self.scripts = 0, set(), ""
        self.feed(text)
        assert not self.open_tags, f"tags without an end: {self.open_tags}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.num_images += value.startswith("data:image/")
                is_own = value.startswith(("data:", "#"))
                self.external_urls += [] if is_own else [value]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID_TAGS:
            assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, text):
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(text)
        if self.open_tags and self.open_tags[-1] == "script":
            self.scripts += text
