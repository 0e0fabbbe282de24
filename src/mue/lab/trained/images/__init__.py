"""What a model that draws images is good for: are its samples like what was held out, of the class asked for, and no copies?

``classifier`` is trained on the same images, independently of the model; ``likeness`` compares sets of images in its features and pixel by
pixel. A few hundred images are held out at this scale, so that nothing here is called FID: that is of Inception's 2,048 features and of
50,000 images.
"""
