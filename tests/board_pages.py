"""What a page of the board says, for tests that read it."""


def said(at):
    """Everything that a page says."""
    kinds = ("title", "subheader", "markdown", "caption", "html", "warning", "info", "error")
    return (
        "\n".join(str(element.value) for kind in kinds for element in at.get(kind) if hasattr(element, "value"))
        + ("\n".join(element.proto.body for element in at.get("html")))
        + "\n".join(str(box.options) for box in at.selectbox)
    ).replace("\\", "")  # as it is read: what means something in Markdown is escaped
