package natsserver

// Leaders returns how many nodes believe to lead the stream.
func (c *Cluster) Leaders(stream string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	leaders := 0
	for _, n := range c.nodes {
		if n.leads(stream, c.options.Nodes) {
			leaders++
		}
	}
	return leaders
}

// WithPorts says where ports come from, and what is to be called when one is taken.
func WithPorts(o Options, find func() (int, error), refused func()) Options {
	o.find, o.refused = find, refused
	return o
}
