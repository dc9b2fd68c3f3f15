package esdbserver

import (
	"context"
	"net"
	"strconv"

	"github.com/EventStore/EventStore-Client-Go/v4/protos/gossip"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/serverfeatures"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/google/uuid"
)

// Member is a node of the cluster that the server tells of.
type Member struct {
	// Address is its host:port.
	Address string
	// Leader says that it is the leader; else it is a follower.
	Leader bool
	Alive  bool
}

// Cluster sets the members that Gossip tells of. By default there is one, this
// server, and it is the leader. An address that is not host:port is left out.
func (s *Server) Cluster(members ...Member) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.members = members
}

type gossipService struct {
	gossip.UnimplementedGossipServer
	node *node
}

// Read tells of the members.
func (g *gossipService) Read(context.Context, *shared.Empty) (*gossip.ClusterInfo, error) {
	s := g.node.server
	s.faults.mu.Lock()
	members := s.faults.members
	following := s.faults.leader != nil
	s.faults.mu.Unlock()
	if len(members) == 0 {
		members = []Member{{Address: g.node.listener.Addr().String(), Leader: !following, Alive: true}}
	}
	info := &gossip.ClusterInfo{}
	for _, m := range members {
		host, text, err := net.SplitHostPort(m.Address)
		if err != nil {
			continue
		}
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			continue
		}
		state := gossip.MemberInfo_Follower
		if m.Leader {
			state = gossip.MemberInfo_Leader
		}
		info.Members = append(info.Members, &gossip.MemberInfo{
			// Derived from the address: a node keeps its id.
			InstanceId:   toUUID(uuid.NewSHA1(uuid.Nil, []byte(m.Address)), false),
			TimeStamp:    ticks(s.now()),
			State:        state,
			IsAlive:      m.Alive,
			HttpEndPoint: &gossip.EndPoint{Address: host, Port: uint32(port)},
		})
	}
	return info, nil
}

type featuresService struct {
	serverfeatures.UnimplementedServerFeaturesServer
}

// GetSupportedMethods tells what there is; what it leaves out clients do not use.
func (*featuresService) GetSupportedMethods(context.Context, *shared.Empty) (*serverfeatures.SupportedMethods, error) {
	answer := &serverfeatures.SupportedMethods{EventStoreServerVersion: Version}
	for _, m := range []struct {
		service, method string
		features        []string
	}{
		{"event_store.client.streams.streams", "read", []string{"position", "events"}},
		{"event_store.client.streams.streams", "append", nil},
		{"event_store.client.streams.streams", "delete", nil},
		{"event_store.client.streams.streams", "tombstone", nil},
		{"event_store.client.gossip.gossip", "read", nil},
		{"event_store.client.server_features.serverfeatures", "getsupportedmethods", nil},
	} {
		answer.Methods = append(answer.Methods, &serverfeatures.SupportedMethod{ServiceName: m.service, MethodName: m.method, Features: m.features})
	}
	return answer, nil
}
