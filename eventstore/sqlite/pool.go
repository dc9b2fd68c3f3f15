package sqlite

import (
	"context"

	"github.com/deed-go/deed/eventstore"
)

// pool lends connections, opening them as needed up to its size.
type pool struct {
	dial func() (*conn, error)
	// slots holds one token for each connection that may be lent; a nil conn is a
	// right to open one.
	slots  chan *conn
	closed chan struct{}
}

func newPool(size int, dial func() (*conn, error)) *pool {
	p := &pool{dial: dial, slots: make(chan *conn, size), closed: make(chan struct{})}
	for range size {
		p.slots <- nil
	}
	return p
}

// get borrows a connection; put must be called with it.
func (p *pool) get(ctx context.Context) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-p.closed:
		return nil, eventstore.ErrClosed
	default:
	}
	var c *conn
	select {
	case <-p.closed:
		return nil, eventstore.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	case c = <-p.slots:
	}
	if c != nil {
		return c, nil
	}
	c, err := p.dial()
	if err != nil {
		p.slots <- nil
		return nil, err
	}
	return c, nil
}

// put gives a connection back. One that is still in a transaction is not used
// again.
func (p *pool) put(c *conn) {
	if c.inTransaction() {
		c.close()
		c = nil
	}
	p.slots <- c
}

// close refuses further loans, waits for those that are out and closes all
// connections.
func (p *pool) close() {
	close(p.closed)
	for range cap(p.slots) {
		if c := <-p.slots; c != nil {
			c.close()
		}
	}
}
