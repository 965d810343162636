"""The section `promotion`."""

from pydantic import Field

from memmcl.config.section import Section


class PromotionConfig(Section):
    """When a retrained model takes the champion's place."""

    champion: str = Field(
        "champion",
        pattern=r"^[a-z0-9][a-z0-9-]{0,59}$",
        description="Name of the champion that a retrain challenges; a store may keep several",
    )
    margin: float = Field(
        2.0, ge=0, le=100, description="Paired standard errors by which a challenger must beat the champion"
    )
