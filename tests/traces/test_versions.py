from moesim.traces.versions import version


def test_a_package_that_is_not_installed_stops_nothing():
    assert version("numpy")[0].isdigit()
    assert version("no-package-has-this-name") == "not installed"
