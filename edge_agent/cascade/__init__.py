"""When the edge answers alone and when a large model is asked: confidence and policy (pure), and the way there."""
