"""The hosts of a job: before it, which is fit for it; during it, whether all ranks are alive."""
