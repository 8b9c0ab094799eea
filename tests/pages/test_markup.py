from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from tbjax.pages.markup import Markup, element, joined


class Reader(HTMLParser):
    """What a browser would find: tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_comes_out_as_it_went_in_and_makes_no_tags(content, attribute):
    read = Reader(element("p", content, title=attribute))
    assert read.tags == [("p", {"title": attribute})]
    assert read.text == content


def test_elements_nest_and_lists_of_them_join():
    rows = [element("tr", element("td", number)) for number in (1, 2)]
    assert element("table", rows, None) == "<table><tr><td>1</td></tr><tr><td>2</td></tr></table>"


def test_attributes_are_spelled_as_in_html_and_left_out_where_there_is_none():
    assert element("i", class_="a b", aria_label="x", id=None) == '<i class="a b" aria-label="x"></i>'


def test_void_elements_have_no_end():
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_coordinates_are_written_to_a_hundredth_of_a_pixel():
    assert element("rect", x=1 / 3, y=2.0) == '<rect x="0.33" y="2"></rect>'


def test_only_markup_is_taken_as_it_is():
    assert joined("<b>") == "&lt;b&gt;"
    assert joined(Markup("<b>")) == "<b>"
