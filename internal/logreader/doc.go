// Package logreader reads a log once for all who follow it in one process:
// subscribers that are near one another share one subscription of the store,
// whose query is the union of theirs. It may import eventstore.
//
// # Groups
//
// Those who share a subscription are a [Reader]'s group. A goroutine reads for
// it, a little ahead of the fastest member, and keeps the last batches in a
// window, so that members need not be equally fast and whoever is a little
// behind can join. Events are matched against the query of each member.
//
// Nobody waits for a slow member: once the window has moved past it, it goes on
// in another group, alone if need be, from where it is, and comes back when it
// has caught up. So it is with whoever begins far behind: several that catch up
// from similar places are a group of their own.
//
// A subscriber that asks for more than a group near it reads ends that group:
// all of its members take what was read, and go on in one with the larger query
// that begins no later than where the first of them needs it. They wait for
// that one to read again the few events by which they are ahead. The same
// happens when groups come near one another, and, with a smaller query, after
// members have gone.
//
// The goroutine of a group ends with its last member, which waits for it.
package logreader
