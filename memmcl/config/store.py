"""The section `store`."""

from pydantic import Field

from memmcl.config.section import Place, Section


class StoreConfig(Section):
    """Where artifacts lie. Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."""

    url: Place = Field("memmcl-store", min_length=1, description="Directory, file:// or s3:// URL of the store")
    endpoint_url: Place | None = Field(None, description="Endpoint of an S3 server other than AWS")
    region: str | None = Field(None, description="Region of the bucket")
