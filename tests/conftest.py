def pytest_generate_tests(metafunc):
    """`variant` runs a block's property for all of its variants, `first_variant` for the first alone."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", metafunc.cls.variants)
    if "first_variant" in metafunc.fixturenames:
        metafunc.parametrize("first_variant", list(metafunc.cls.variants)[:1])
